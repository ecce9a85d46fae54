"""What tests share: real servers, clients, sinks and scripted doubles."""
