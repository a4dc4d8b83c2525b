"""Where models come from: what hubs list, what of it a model needs, and which of several ways to a model costs least.

    asked      what a person typed, understood             repository   what a hub lists, checked, and what it means
    choose     the ways to what was asked, cheapest first  preflight    what a way fetches, writes and needs
    speed      how fast the last pull was                  sources      the same of any source:
    huggingface, modelscope    listings and addresses      local        a file or folder of this computer

`qwen2_converters.pull` and its modules are the callers. Only `sources` and the two hubs touch the network, and load what they need for it late.
"""
