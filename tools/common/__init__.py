"""Shared by the tools: the command line, and figures."""
