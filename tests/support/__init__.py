"""What tests share: servers, stand-ins, tiny models and runs."""
