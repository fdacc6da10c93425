"""What a model is worth: metrics, baselines, segments."""
