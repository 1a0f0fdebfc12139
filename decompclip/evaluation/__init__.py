"""What a model's outputs amount to: zero-shot classifiers, accuracy, attack success, detection."""
