"""Prompt to tokens to text: prefill, decode, sampling, snapshots."""
