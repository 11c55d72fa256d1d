"""The protocols that clients speak: lorarep.v1, fmaas, OpenAI, and the status page."""
