"""Makes what the backends read out of a Qwen2 checkpoint as Hugging Face publishes it: a GGUF file for llama.cpp, a folder for MLX.

    convert   the whole way: checks, disk, writing, publishing      install   the same into the store, with a manifest
    target    what to make ("gguf:q4_0", "mlx:4bit")                plan      what will be written, before any weight is read
    gguf      writes a GGUF file; keys, mix and ggml serve it       mlx       writes an MLX folder
    job       how one output is written, by gguf or mlx             blocks    moves weights to all outputs in bounded memory
    destination   where a conversion may write                      companions   the small files beside the weights
    verify    reads a model back: is it whole?                      compare   how far its weights are from their source's
    download  brings files from a server: resumed, hashed, whole

`making` is what `convert` and `install` share: it writes into a `staging` folder with a `journal`, so that the same call goes on after a crash.
`arriving` says how to convert weights that are still being fetched.

A checkpoint of GPTQ or AWQ: `packed` reads its matrices, `gptq` and `awq` know their packing, `repack` the outputs', `plan_packed` what becomes of
what. A LoRA adapter: `lora` reads it, `merge` adds it to the weights on their way, `adapters` converts it by itself.

`pull` goes the way from a name to an installed model: `hub` looks and chooses, `pull_plan` says what that means, `here` finds what is on this
computer already, `gather` brings the files together, `fetching` brings shards while they are converted, and `pull_step` tells how far it is;
`again` keeps what a stopped one needs to go on.
`download` is told by `remote` what to fetch; `web` asks, `retry` how often, and `partial` is a file on its way.

The API and the command line call `pull`, `convert` and `install` when they need them; `target` and `plan` are cheap to import. No conversion
touches the network, runs code of a checkpoint, or copies any.
"""
