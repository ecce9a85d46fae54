"""Tests of whole processes: the command, real MCP clients and servers, a real OPA."""
