"""Where models come from: what hubs list, what of it a model needs, and which of several ways to a model costs least.

    asked      what a person typed, understood             repository   what a hub lists, checked, and what it means
    choose     the ways to what was asked, cheapest first  preflight    what a way fetches, writes and needs
    huggingface, modelscope, direct                        listings and addresses of each source

`qwen2_converters.pull` is the caller. `asked`, `repository`, `choose` and `preflight` touch no network; the sources load their libraries late.
"""
