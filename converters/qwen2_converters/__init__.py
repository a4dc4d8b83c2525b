"""Makes what the backends read out of a Qwen2 checkpoint as Hugging Face publishes it: a GGUF file for llama.cpp, a folder for MLX.

    convert   the whole way: checks, disk, writing, publishing      plan    what will be written, as plain data, before any weight is read
    target    what to make ("gguf:q4_0", "mlx:4bit")                blocks  moves rows of weights from file to file, in bounded memory
    gguf      writes a GGUF file; keys, mix, ggml serve it          mlx     writes an MLX folder

The API and the command line call `convert` when they need it; nothing here is imported before. No conversion touches the network.
"""
