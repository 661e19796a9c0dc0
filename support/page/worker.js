// The engine in a thread of its own, so that the page stays quick whatever the model takes.
// Messages: {id, name, given}, of which the first creates it; answers: {id, found} or {id, error}.

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

// One after the other: a session runs one graph at a time.
onmessage = ({data}) => { last = last.then(() => answer(data)); };
