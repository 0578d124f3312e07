"""What is trained on, and how often: dynamic sampling, reward shaping, overlong responses, curriculum, replay."""
