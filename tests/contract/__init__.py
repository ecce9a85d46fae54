"""Tests of the policies and the decision client against a real OPA."""
