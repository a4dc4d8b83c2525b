"""Markdown for a terminal, as it streams in: text to blocks, blocks to lines. Knows nothing of widgets, screens or colours.

  lines      what one line may begin
  blocks     text -> blocks, line by line: what is settled never changes again, wherever a stream was cut
  inline     emphasis, code, links of a block -> runs of text with an ink
  wrap       runs -> lines of a width, in cells
  code       lines of code -> runs, highlighted line by line
  table      rows -> aligned columns that fit a width
  render     a block -> lines
  document   one message at a width: only the lines asked for are rendered

An ink is a number that says what a piece of text is; the palette of the widget that draws it says how that looks. So a change of theme
lays nothing out again. Everything is bounded: no line, block, table or nesting costs more than the text it shows.
"""
