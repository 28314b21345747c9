"""Ranks: how they are launched, laid out and sharded, how they communicate, and how a lost one is noticed."""
