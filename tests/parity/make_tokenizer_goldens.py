"""Write tests/data/tokenizers/golden_ids.json: transformers' ids for TEXTS. Run in the repository's folder:

PYTHONPATH=tests python tests/parity/make_tokenizer_goldens.py
"""

import json
import os

from transformers import AddedToken, CLIPTokenizer, Qwen2Tokenizer

from tokenizer_data import DATA, fingerprint, tokenizer_folder

TEXTS = {  # title → text, or [text, how many times]
    "empty": "",
    "English": "A red fox runs through fresh snow at dawn, slow motion, 35mm film grain.",
    "Russian": "Рыжая лиса бежит по свежему снегу на рассвете. Ёлки, съёмка с дрона — объёмный свет!",
    "Chinese": "一只红狐狸在黎明时分跑过新雪，慢镜头，电影质感。「你好」，世界！",
    "Japanese and Korean": "夕焼けの東京タワー、カメラがゆっくりズームする。붉은 여우가 눈 위를 달린다.",
    "Arabic, Hebrew, Hindi, Thai": "ثعلب أحمر يجري ١٢٣ שועל אדום रात में लोमड़ी दौड़ती है สุนัขจิ้งจอกสีแดง",
    "Turkish and German letters": "İstanbul'da ıssız sokak, STRASSE Straße GROẞ ǅungla ΣΊΣΥΦΟΣ",
    "English contractions": "it's I'm you're they've we'll he'd don't IT'S DON'T You'Re 'tis l'Main ''s",
    "other contractions": "l'été c'est l'ami d'Artagnan dell'arte 'n huis об'єкт п'ять rock’n’roll it’s",
    "numbers": "1234567890 3.14159 1,000,000 12:30 24fps 1920x1080 ½ ² Ⅷ ①②③ ٤٥٦ １０２０ 1e-5",
    "punctuation": "Wait... what?! (no -- really) [x]{y} #tag @user $5 a/b a\\b <b>b</b> ~^_^~ «ёлки» “so”",
    "code": "def f(x):\n\treturn x ** 2  # 平方\n\n\nif __name__ == '__main__':\n    print(f(3))\n",
    "emoji": "🦊❄️😀👍🏽 ok👌",
    "emoji joined": "👨‍👩‍👧‍👦 👩🏾‍🚀 🏳️‍🌈 ❤️‍🔥 🧑‍🤝‍🧑",
    "flags": "🇷🇺🇨🇳🇺🇸🇫🇷 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🏴‍☠️",
    "spaces": "a b  c   d    e                 f ",
    "leading and trailing spaces": "   both sides   ",
    "only spaces": "     ",
    "newlines": "one\ntwo\n\nthree\n\n\n\nfour\r\nfive\r\n\r\nsix\rseven",
    "newlines and spaces": " \n \n  x \n\n  y\t\t\n z \n",
    "tabs": "\ta\t\tb \t c",
    "odd white space": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u2029g\u0085h\x0bi\x0cj\ufeffk",
    "accents composed": "café naïve Ångström Việt Nam Żółć",
    "accents decomposed": "cafe\u0301 A\u030angstro\u0308m Vie\u0323\u0302t Z\u0307o\u0301łc\u0301",
    "Russian decomposed": "е\u0308лка и\u0306од мо\u0301ре",
    "marks in any order": "q\u0307\u0323 \u0301 x\u0301\u0302\u0303\u0304 \u212b\u2126\u1e9b\u0323",
    "Hangul in jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af 한글",
    "compatibility forms": "ﬁne ﬀ ｆｕｌｌｗｉｄｔｈ ㎏ ™ ℌ",
    "mathematics": "∑∞ ≠ √2 ≈ 1.414 ⟨ψ|φ⟩ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "rare planes": "𠀀𪚥 𐍈 \U0001f9ff \ue000 \U0010fffd",
    "control characters": "a\x00b\x01c\x7fd\u200ee\u202ef",
    "Qwen special tokens": "<|im_start|>user\nA fox<|im_end|>\n<|im_start|>assistant\n<think><|endoftext|>",
    "Qwen vision tokens": "<|vision_start|><|image_pad|><|video_pad|><|vision_end|> <tool_call>x</tool_call>",
    "CLIP special tokens": "<|startoftext|>a fox <|endoftext|><|endoftext|>",
    "special tokens glued": "fox<|im_end|>fox  <|endoftext|>  fox!<|startoftext|>!",
    "special tokens in capitals": "<|IM_START|> <|StartOfText|>! !<|EndOfText|> <|endoftext|",
    "special token and a mark": "a<|im_end|>\u0338b <|endoftext|>\u0338",
    "end of word": "a</w> </w> w</w>ord",
    "long": ["The camera slowly moves, ёлка 雪 🦊 12! ", 525],  # 20,475 characters
    "long without spaces": ["снегопадsnowfall", 1250],
}


def load_reference(name: str):
    """transformers' fast tokenizer of one of our two vocabularies, as their released configs set it up."""
    folder = tokenizer_folder(name)
    if name != "qwen2.5":
        return CLIPTokenizer.from_pretrained(folder)
    # A released tokenizer_config.json says normalized=False of every added token. Without it transformers
    # normalizes, and then does not see <|im_end|> before U+0338, which NFC composes with the ">".
    added_tokens = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    decoder = {i: AddedToken(token, normalized=False, special=True) for token, i in added_tokens.items()}
    return Qwen2Tokenizer.from_pretrained(folder, added_tokens_decoder=decoder)


def main():
    references = {name: load_reference(name) for name in ("qwen2.5", "clip-vit-large-patch14")}
    lines = []
    for title, text in TEXTS.items():
        piece, times = text if isinstance(text, list) else (text, 1)
        golden = {"text": piece, "times": times}
        for name, reference in references.items():
            golden[name] = fingerprint(reference.encode(piece * times, add_special_tokens=False))
        lines.append(f"{json.dumps(title)}: {json.dumps(golden)}")
    path = DATA / "golden_ids.json"
    path.with_suffix(".part").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    main()
