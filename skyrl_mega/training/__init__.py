"""What happens to a TrainBatch on the ranks: policy, reference, optimizer."""
