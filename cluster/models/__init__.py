"""Models on disk: location, default models, fine-tuning, calibration and drift references."""
