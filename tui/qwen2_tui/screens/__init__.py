"""One screen, one idea. Only the chat is imported when the app starts; the others when they are opened."""
