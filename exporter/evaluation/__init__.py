"""Published quality figures for an exported transformer: images of a prompt list, and metrics of their own packages."""
