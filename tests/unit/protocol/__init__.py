"""Bytes to meaning: messages, methods, conversations, and what the server lists."""
