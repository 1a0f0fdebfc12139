"""Runnable studies: each module measures one thing and writes its result."""
