"""What the command line offers; each module imports what is heavy only once its command runs."""
