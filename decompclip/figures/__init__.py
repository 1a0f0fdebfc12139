"""Results as plotly figures, all in one theme that reads in colour, in grey and by colour-blind eyes."""
