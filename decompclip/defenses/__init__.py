"""Repair and detection: fitted on clean images, in scikit-learn's shape."""
