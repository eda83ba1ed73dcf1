"""Texts in many scripts, by language tag: what tokenizers and files must give back as it was.

Right to left, bidirectional marks, combining marks composed and decomposed, no spaces between words, joiners, and
characters outside the basic plane. `LINES` alone holds line breaks.
"""

import unicodedata

VIETNAMESE = "Tiếng Việt có dấu: ngữ nghĩa"
LINES = "und-x-lines"

SCRIPTS = {
    "en": "  two  spaces, and\ta tab ",
    "vi": unicodedata.normalize("NFC", VIETNAMESE),
    "vi-x-nfd": unicodedata.normalize("NFD", VIETNAMESE),
    "yo": "Ẹ kú àárọ̀, ṣé dáadáa ni? Ọ̀rọ̀",
    "ru": "Сорок два, ёж и э́хо",
    "el": "Σαράντα δύο, ἄνθρωπος",
    "ka": "ორმოცდაორი სიტყვა",
    "hy": "Քառասուներկու բառ։",
    "ar": "اِثنان وأربعون كِتابًا",
    "ar-x-bidi": "\u200fقيمة \u2067ABC 42\u2069 و\u202bنص\u202c\u200e!",
    "fa": "چهل و دو می\u200cخواهم",
    "he": "אַרְבָּעִים וּשְׁתַּיִם",
    "hi": "बयालीस क्षेत्र, श्री",
    "bn": "বিয়াল্লিশ কৃষ্ণ",
    "ta": "நாற்பத்திரண்டு சொற்கள்",
    "si": "හතළිස් දෙක ශ්\u200dරී",
    "th": "สี่สิบสองน้ำกินที่นี่",
    "km": "សែសិបពីរភាសាខ្មែរ",
    "my": "လေးဆယ့်နှစ် မြန်မာဘာသာ",
    "bo": "བཞི་བཅུ་ཞེ་གཉིས།",
    "am": "አርባ ሁለት ቃላት።",
    "zh": "四十二個字，𠮷野家",
    "ja": "四十二カタカナとひらがな、が\u3099",
    "ko": "마흔두 낱말",
    "ko-x-jamo": unicodedata.normalize("NFD", "마흔두 낱말"),
    "und-x-emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 🇰🇪 1️⃣",
    LINES: "e\u0301 one\n\n two \u200c\n",
}
