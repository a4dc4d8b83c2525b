"""The KV cache: what a model has computed for tokens it has read, kept in RAM and on disk under the hash of those tokens.

`KvCache` is what an engine, chats and the API use; `Disk` alone what commands use that only list and delete. `chain` says how tokens become
names, `record` what a file looks like. A damaged, foreign or missing file is a miss: then the tokens are computed again.
It knows fingerprints, tokens and bytes; nothing of engines, backends or chats. docs/kv-cache.md says what is stored and for how long.
"""

from qwen2_local.kvcache.cache import Found, Hit, KvCache, Sizes
from qwen2_local.kvcache.chain import CHUNK
from qwen2_local.kvcache.disk import Disk, Stored
from qwen2_local.kvcache.settings import BUDGET, SWITCH, open_default

__all__ = ["BUDGET", "CHUNK", "SWITCH", "Disk", "Found", "Hit", "KvCache", "Sizes", "Stored", "open_default"]
