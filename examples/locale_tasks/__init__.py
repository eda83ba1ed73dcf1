"""The offline multilingual example: locale tasks made from CLDR, ICU and num2words."""
