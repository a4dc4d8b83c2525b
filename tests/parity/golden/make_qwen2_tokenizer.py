"""Write qwen2_tokenizer.json: hard texts and their ids, by implementations that share no code with ours.

Run once, in a throwaway environment: `pip install tiktoken "transformers<5"; pip install --no-deps dashscope; python make_qwen2_tokenizer.py`.
The ids are tiktoken's, with the official vocabulary and Qwen's own split pattern and NFC. Transformers' slow Qwen2Tokenizer (its own
Python BPE and the `regex` module) has to agree on every text; its merges are derived from the same vocabulary.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import random
import tempfile
import unicodedata
from pathlib import Path

import tiktoken
from transformers import Qwen2Tokenizer

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LANGUAGES = """Good morning! What can I do for you today?
我想了解一下量子计算的基本原理，以及它与经典计算的区别。
《紅樓夢》是中國古典小說的巔峰之作。
Wie heißt der größte Fluß, der durch Österreich fließt?
Où êtes-vous né, et qu'est-ce que c'est que ça ? « Voilà »
¿Cuántos años tienes? ¡Mañana será otro día!
A ação começou às três; não há razão para preocupação.
Perché l'università è così lontana dalla città?
Hoe laat begint de vergadering 's middags?
Съешь ещё этих мягких французских булок, да выпей чаю.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Zażółć gęślą jaźń, pchnąć w tę łódź jeża.
السلام عليكم ورحمة الله وبركاته، كيف حالك اليوم؟
زبان فارسی را می‌توان آموخت؛ این کتاب‌ها خوب‌اند.
שָׁלוֹם עוֹלָם! מה שלומך היום?
İstanbul'da ışıklı çarşıları gezdiğimde güneş batıyordu.
吾輩は猫である。名前はまだ無い。カタカナもﾊﾝｶｸも。
대한민국의 수도는 서울이며, 한강이 흐릅니다.
Tiếng Việt có nhiều dấu: ắ ằ ẳ ẵ ặ, ượ, nghiêng ngả.
ภาษาไทยไม่มีช่องว่างระหว่างคำ และมีวรรณยุกต์
Selamat pagi, apa kabar? Terima kasih banyak.
Apakah awak sudah makan nasi lemak?
ພາສາລາວມີຄວາມງາມ ແມ່ນ້ຳຂອງ
မြန်မာစာသည် လှပသော အက္ခရာဖြစ်သည်။
Maayong buntag kaninyong tanan!
ភាសាខ្មែរមានព្យញ្ជនៈ ៣៣ តួ
Magandang umaga po sa inyong lahat.
नमस्ते, आप कैसे हैं? क्षत्रिय ज्ञान श्री
আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।
اردو ایک خوبصورت زبان ہے، ہے نا؟
Ελληνικά: ο λόγος και η ψυχή, Σίσυφος
Հայերեն և ქართული ენა
አማርኛ ቋንቋ ነው። ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ""".splitlines()

CODE = [
    "def f(x: int = 0) -> list[str]:\n    return [str(i) for i in range(x)]\n",
    "if (a && b || !c) { x <<= 2; y ^= ~z; }\n\n\n\treturn;\n",
    "\t\tfor (let i=0;i<10;i++) console.log(`${i}`);//…",
    "SELECT * FROM t WHERE a='it''s' AND b<>\"x\";",
    "#include <stdio.h>\r\nint main(void)\r\n{\r\n\treturn 0;\r\n}\r\n",
    "<div class=\"a\" id='b'>&nbsp;&lt;|x|&gt;</div><!-- c -->",
    "https://example.org/a/b.html?x=1&y=%20#frag user@mail.example",
    'C:\\Users\\x\\n\\t\\0  $HOME/${x:-y} `ls -la | grep "^d"`',
    '{"a": [1, 2.5e-10, null, true], "\\u00e9": "\\n"}',
    "fn main() -> Result<(), Box<dyn Error>> { let x = &mut y; Ok(()) }",
    "\\begin{align} \\frac{\\partial f}{\\partial x} &= \\sum_{i=1}^{n} x_i^2 \\end{align}",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case __dunder__",
    "0x1F 0b101 1_000_000 1e-9 3.14159265358979 -42 +7 1,234,567.89",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n> quote\n> > deeper\n\n1. x\n   - y\n",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-a\n+b\n c",
    "ls\x1b[31mred\x1b[0m\x07\x08",
    "                if x:\n                        pass\n        ",
    '#!/usr/bin/env bash\nset -euo pipefail\nfor f in *.txt; do echo "$f"; done',
    "=====-----*****~~~~~_____.....,,,,,;;;;;:::::",
    "((((((((([[[[[[[[{{{{{{{<<<<<<<>>>>>>>}}}}}}}]]]]]]]])))))))))",
]

CONTRACTIONS = [
    "I'm you're he's we've they'll I'd don't isn't",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T ISN'T",
    "I'Ll you'Re he'S we'vE",
    "'s't're've'm'll'd",
    "''s '' 'x 'S 'tt 'rer 'llama 'dog 'm.",
    "it’s don’t l’été ‘quoted’",
    "rock 'n' roll, the '90s, o'clock, y'all'd've",
    " 's\n't\t're",
    "x's1's",
    "d'd'd'D'D",
]

MARKS = [
    "<|im_end|>",
    "<|im_start|>system\nYou are evil.<|im_end|>\n<|im_start|>user\n",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|im_end|><|im_end|>",
    " <|im_end|> ",
    "<|im_end|>\n",
    "<|im_start",
    "|im_start|>",
    "< |im_end|>",
    "<|im_\u200bend|>",
    "<|IM_END|>",
    "＜｜im_end｜＞",
    "<|extra_0|> <|extra_204|>",
    "<tool_call>{}</tool_call>",
    "<|object_ref_start|><|vision_pad|><|image_pad|>",
    "[PAD151646] <s></s><unk> [INST]",
    "<think>\n\n</think>\n\n",
    "<<|im_end|>>",
    "<|im_end|>é e\u0301<|im_start|>",
]

SPACES = [
    " ", "  ", "   ", " " * 7, " " * 64, " " * 200, "\t", "\t\t\t", "\n", "\n\n", "\n" * 9, "\r\n", "\r\n\r\n", "\r", "\r\r\n\n\r",
    " \n", "\n ", " \n \n ", "a  b", "a   b", "a \n b", "a\n\n\nb", "a \t b", "x" + " " * 33 + "y", "end   ", "   start",
    "\t x\t\ty \t", "a\u00a0b \u00a0 c", "a\u3000b\u3000\u3000c", "\u2003em\u2002en\u2009thin\u202fnarrow",
    "a\u2028b\u2029c", "a\x0bb\x0cc\x1cd\x85e", "1 2  3   4", "! !  !   !", " !\n\n", "?\n\n\nx", ".\r\n\r\nx", "…\n",
    "a\n\t\tb\n\t\t\tc", "\n\n  \n\n  x", "  \r\n  \r\n", "\u1680\u2000\u205f x",
]  # fmt: skip

NUMBERS = [
    "0", "12", "123", "1234567890", "9" * 50, "3.14", "1,000,000", "1/2 ½ ⅔ ² ³ ₄", "Ⅳ ⅷ ↂ", "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵",
    "०१२३४५", "一二三四五六七八九十百千万億", "１２３４５", "𝟏𝟐𝟑 𝟘", "①②③ ⓪ ㊿", "10:30 2024-06-07T00:00:00Z",
    "+33 1 23 45 67", "v1.2.3-rc4", "a1b2c3", "1a 2b", "1st 2nd 3rd", "$1.50 €2 ￥3 £4", "50% ‰ 100°C", "192.168.0.1",
    "3×4÷2=6 √2 ≈1.414 ∞",
]  # fmt: skip

UNICODE = [
    "é", "e\u0301", "ﬁ ﬂ ﬀ ﬆ", "Å \u212b A\u030a", "Ω \u2126", "ñ n\u0303 N\u0303", "ạ\u0306 a\u0306\u0323 ặ",
    "e\u0301\u0301\u0327", "\u0301", " \u0301x", "a\u0301\u200db", "한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "\u1100\u1161\u1100\u1161\u11a8", "\u1100 \u1161 \u11a8", "ㅎㅏㄴㄱㅡㄹ", "\u1112\u1161ᆫ글",
    "が か\u3099 ガ カ\u3099 ﾊﾞ", "\u0958 क\u093c \u09dc \u0e33 \u0e4d\u0e32", "\u0344 \u0340 \u0387 \u037e \u1fef",
    "\uf900 \ufa0e 豈 樂", "\U0002f800 \U0002f804", "😀", "😀😃😄😁", "👨‍👩‍👧‍👦", "👩🏽‍💻 👨🏿‍🚀", "🏳️‍🌈 🏴‍☠️",
    "🇫🇷🇩🇪🇨🇳🇱🇦", "1️⃣ 2️⃣ #️⃣", "❤️ ❤ ☺︎ ☺️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🤷🏻‍♂️🤦‍♀️", "a😀b 😀 c", "ok👌👌🏾!!",
    "\u200b\u200c\u200d\u2060\ufeff", "zero\u200bwidth\u200djoin", "\ufeffBOM", "soft\u00adhyphen",
    "\u202eRTL\u202c \u2066iso\u2069", "\u061c\u200e\u200f", "\x00", "a\x00b\x01\x02\x7f", "\x80\x81\x9f",
    "\ufffd\ufffd", "\ufffe\uffff", "\U0010ffff\U000f0000", "\ue000\uf8ff", "\ufdd0", "𝒜𝓁𝓁 𝔐𝔞𝔱𝔥 𝕊𝕥𝕪𝕝𝕖", "𐍈𐌰 𐎠 𓀀𓂀 𒀀",
    "𠀀𠮷𪚥", "Z̵̢͎a̷l̶g̸o̴ t̷e̵x̸t̶", "ǅ ǈ ŉ ǰ ẖ İ ı ſ ẞ", "←↑→↓⇒⇔∀∃∈∑∏∫≠≤≥", "┌─┐│└┘█▓▒░", "♠♣♥♦♪♫☀☁☂",
    "“curly” ‘quotes’ „low“ «guill» 「角」『二重』", "–—―‐‑−", "•·‧…‥", "，。！？；：（）【】《》、",
    "ا\u064e\u0644\u0633\u0651", "بِسْمِ ٱللَّهِ", "ک\u200cگ", "שׁ \ufb2a \ufb49", "ក្ក ក្រុំ",
    "\u0f71\u0f72 \u0f73 བོད་སྐད", "\u0c4d\u0c56 త్ర", "กำ ก\u0e4d\u0e32 เเ แ", "နို့ ကြွ", "ᠮᠣᠩᠭᠣᠯ", "ߒߞߏ", "ꦲꦏ꧀ꦱꦫ",
    "\u2f00⼀ ⺀", "㍿ ㌔ ㎏ ℃ №", "Ⓐⓩ 🄰 🅱️", "ﷺ ﷽", "꜀꜁ʰʲˠ ə ŋ ʃ ɹ", "ʻokina ʼn ˈstress",
]  # fmt: skip

WORDS = [
    "Supercalifragilisticexpialidocious", "Donaudampfschifffahrtsgesellschaftskapitän", "antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abc" * 40, "的" * 60, "AbCdEfGhIjKlMnOpQrStUvWxYz", "THE QUICK BROWN FOX",
    "theQuickBrownFox", " leading", "trailing ", "a", " a", "A", ".", " .", "...", "!?!?!?", "---\n", "***", "\\", "\"",
    "'", "`", "_", "-a", "(a)", "#tag @user", "hello world", "Hello, World!", "e.g. i.e. etc.", "U.S.A.", "x²+y²=z²",
    "H₂O CO₂", "naïve café résumé Zoë", "mixed中文English混合テキスト한글", "email@例え.jp", "a/b\\c|d",
    "lorem ipsum dolor sit amet, consectetur adipiscing elit", "QWEN2 Qwen2 qwen2 通义千问", "ok\u0000ok",
]  # fmt: skip


def random_texts(generator: random.Random) -> list[str]:
    """Mixtures no person would type: scraps of everything above, and characters from all over the first two planes."""
    blocks = [
        (0x20, 0x7E), (0x20, 0x7E), (0x0, 0x20), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x5D0, 0x5EA),
        (0x620, 0x669), (0x904, 0x96F), (0xE01, 0xE3A), (0x1100, 0x1175), (0x11A8, 0x11C2), (0x2000, 0x206F),
        (0x2190, 0x22FF), (0x3041, 0x30FE), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE010), (0xFF01, 0xFF5E),
        (0x1F300, 0x1F64F), (0x1D400, 0x1D4FF),
    ]  # fmt: skip
    scraps = [*SPACES, *CONTRACTIONS, *MARKS, *NUMBERS, *UNICODE, "'s", "'LL", "'", " ", "\n", "\r\n", "  "]
    texts = []
    for _ in range(90):
        width = generator.choice([2, 5, 20, 60])
        texts.append("".join(chr(generator.randint(*generator.choice(blocks))) for _ in range(width)))
    for _ in range(60):
        texts.append("".join(generator.choice(scraps) for _ in range(generator.randint(2, 6))))
    for _ in range(30):
        texts.append(generator.randbytes(generator.choice([8, 40, 120])).decode("latin-1"))
    for _ in range(20):
        texts.append(generator.randbytes(generator.choice([8, 40, 120])).decode("utf-8", "replace"))
    return texts


def texts() -> list[str]:
    """All texts, each once, the empty one included."""
    groups = ["", *LANGUAGES, *CODE, *CONTRACTIONS, *MARKS, *SPACES, *NUMBERS, *UNICODE, *WORDS, *random_texts(random.Random(20240607))]
    return list(dict.fromkeys(groups))


def vocabulary() -> dict[bytes, int]:
    """Qwen's official ranks."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None and spec.origin is not None
    raw = (Path(spec.origin).with_name("resources") / "qwen.tiktoken").read_bytes()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}


def slow_tokenizer(ranks: dict[bytes, int], folder: Path) -> Qwen2Tokenizer:
    """Transformers' own, from vocab.json and merges.txt; a merge is what BPE without the token's own rank makes of its bytes."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    letter = bytes_to_unicode()
    lines = ["#version: 0.2"]
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pair = min(range(len(parts) - 1), key=lambda at: ranks.get(parts[at] + parts[at + 1], rank))
            parts[pair : pair + 2] = [parts[pair] + parts[pair + 1]]
        if len(token) > 1:
            lines.append(" ".join("".join(letter[byte] for byte in part) for part in parts))
    (folder / "vocab.json").write_text(json.dumps({"".join(letter[byte] for byte in token): rank for token, rank in ranks.items()}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), split_special_tokens=True)


def main() -> None:
    ranks = vocabulary()
    first = tiktoken.Encoding("qwen2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        second = slow_tokenizer(ranks, Path(folder))
        for text in texts():
            ids = first.encode(unicodedata.normalize("NFC", text))
            other = second.encode(text)
            if ids != other:
                raise SystemExit(f"the references differ on {text!r}:\n  {ids}\n  {other}")
            cases.append([text, ids])
    lines = ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in cases)
    Path(__file__).with_name("qwen2_tokenizer.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")
    print(f"{len(cases)} texts")


if __name__ == "__main__":
    main()
