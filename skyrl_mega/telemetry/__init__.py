"""What a run says of itself: metrics, trackers, phase timings, progress, plots, benchmark records."""
