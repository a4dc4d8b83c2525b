"""The chats on disk: `chats.db`, one SQLite file for a person. Used by `chat`, the command line and the app.

A message has a parent, so an edited question or a regenerated reply is an alternative beside the old one, and nothing is ever overwritten.
What is deleted is gone: texts, the search index, and the names of KV chunks that only the deleted chats had are given to whoever
deletes those. Knows neither models nor engines: tokens are numbers here.

  records    a message, a chat: plain data
  store      `ChatStore`: everything that is done with them
  desk       of that, drafts, options, the trash, what broke off
  file       of that, the connection and its transactions
  rows       a row of a table, and what it stands for
  schema     the tables; opening, migrating, and what becomes of a damaged or newer file
  attached   files that are attached to a question
  words      what the search index is told of a text
  deletion   deletes chats together with what models have computed of them
  exchange   chats as Markdown, JSON and OpenAI-style message lists, out and in
"""

from qwen2_local.chats.records import ChatMessage, ChatRecord, Hit, State, Summary, path_to
from qwen2_local.chats.store import ChatStore

__all__ = ["ChatMessage", "ChatRecord", "ChatStore", "Hit", "State", "Summary", "path_to"]
