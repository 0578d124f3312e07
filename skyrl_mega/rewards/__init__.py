"""What finished trajectories are worth: functions, reward models and judges, mixed with the environment's reward."""
