"""The recipes that ship with convtool, one TOML file each; `convtool.fusing.shipped` reads them."""
