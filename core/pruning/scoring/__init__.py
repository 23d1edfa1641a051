"""What layers and groups are worth, measured with the gradients of one layer in memory."""
