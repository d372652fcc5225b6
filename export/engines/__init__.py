"""What answers: Hugging Face, llama.cpp in this process, or an Ollama server, all of them greedily."""
