"""The claims of the PGSVD paper (arXiv 2510.05544), measured on one model."""
