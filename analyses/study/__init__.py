"""What every analysis shares: families of models, results with provenance, the command line and the index."""
