from cnntrain.commands import main

if __name__ == "__main__":
    main("train")
