"""Configurations that come with the package: `--config clara:joint`, `mistral_7b:scp`; what each is
for stands at its top. In the repository they are also at configs/."""
