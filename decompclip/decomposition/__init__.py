"""What one forward pass, or a data set of them, leaves behind: terms, moments, activations."""
