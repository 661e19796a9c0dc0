// The engine in its own thread: the page stays quick while the model runs.
// Messages are {id, name, given}; the first one creates the engine. Answers are {id, found} or
// {id, error}.

let engine = null, last = Promise.resolve();

async function answer({id, name, given}) {
  try {
    if (name === "create") {
      engine = await Engine.create(ort, given.wasm, given.graph, given.model);
      postMessage({id});
    } else {
      postMessage({id, found: await engine[name](given)});
    }
  } catch (error) {
    postMessage({id, error: String(error?.message ?? error)});
  }
}

// One message after the other: a session runs one graph at a time.
onmessage = ({data}) => { last = last.then(() => answer(data)); };
