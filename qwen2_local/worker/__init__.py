"""The engine in a process of its own, behind the engine's interface: what crashes there does not crash here.

The public API comes here, for `client.RemoteEngine` and `setup`. The child is `python -m qwen2_local.worker`.

  setup        what a worker is started with, and how an engine is made of it, in this process or another
  frames       lengths and JSON on a pipe
  codec        plain dataclasses to JSON and back, checked by their types
  messages     what is said over the pipe
  server       the child's side
  constraints  grammars, made anew in the child
  process      one child, as the parent sees it
  client       `RemoteEngine`: an engine that starts a child when it needs one, and another when that one died
"""
