"""A CLIP whose image tower is hooked, and every way to load one."""
