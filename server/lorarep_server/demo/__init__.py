"""The demo: tiny trained models, a stand-in for the Hub, and `lorarep demo`. The tests use them too."""
