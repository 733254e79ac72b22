"""Conversations as data: their formats, their loss masks, what they repeat and resemble."""
