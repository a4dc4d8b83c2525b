"""The full-screen terminal app. Planned: nothing is here yet.

It will stand on the public API (`qwen2_local`) like any other program, drive the model in a process of its own, and be called by the
command line alone.
"""
