"""Readers of model files that trust nothing: a file that passes here can be handed to a backend.

    safetensors   one file's header and tensors          gguf         one file's (or split's) header
    config        a Hugging Face or MLX config.json      check_gguf   is it a Qwen2 we run?
    checkpoint    a folder: config, shards, tensors      magic        what a wrong file really is

Anybody may call them. They read headers only, with bounded memory, and never map a file; every fault is a BadFile (UnsupportedModel
for sound files we do not run), never another exception.
"""
