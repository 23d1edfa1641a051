"""The DAG, its command line, and how it runs locally and on a cluster."""
