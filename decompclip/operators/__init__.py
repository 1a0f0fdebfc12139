"""Read or edit a decomposition, or the run that it describes; nothing here knows of attacks."""
