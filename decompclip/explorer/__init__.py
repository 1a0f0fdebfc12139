"""Explorer: a model's heads on some images, in a notebook or as a page of its own. The function is `decompclip.explore`."""
