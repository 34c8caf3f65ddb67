"""Say what a path is and what is in it; published architectures and random models of their sizes."""
