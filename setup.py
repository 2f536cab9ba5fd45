import setuptools

setuptools.setup()  # everything is in pyproject.toml
