"""The engine: one owner thread per loaded model turns prompts of token ids into token events, many requests at once.

It knows tokens, sequences and KV, and nothing of text, chats or files' trust. The public API and the worker come here, for these names alone.

  events       what goes in (`Request`) and comes out (`Prefilled`, `Token`, `Finished`)
  owner        `Engine`: its thread, and the ways into it from other threads
  reply        one caller's end of a request: events that wait for their reader, and its cancel
  scheduler    the loop on the owner thread: take, admit, step, deliver
  work         a request under way: its tokens, and how the next one is chosen
  slices       how many tokens of prompts go into a step
  layout       which KV layout the requests at hand need
  device       the sequences on the device: opened, kept, moved and given back
  prefix       what is known already of a prompt: on the device, or in the KV cache
  speculation  drafts of the next tokens, and whether they pay
"""

from qwen2_local.backends.base import Scores
from qwen2_local.engine.events import Event, Finished, Prefilled, Request, Token
from qwen2_local.engine.owner import Engine
from qwen2_local.engine.reply import Reply

__all__ = ["Engine", "Event", "Finished", "Prefilled", "Reply", "Request", "Scores", "Token"]
